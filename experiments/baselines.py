"""What supervised classifiers reach on the labelled examples alone, beside a semi-supervised run.

    python experiments/baselines.py --config configs/digits.yaml

k-nearest neighbours and support vector machines of scikit-learn, on the very examples that the
config's runs see labelled with data_seed 0, 1 and 2; prints the test error of each.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import as_command  # noqa: E402
from utils.data import load_data  # noqa: E402
from utils.settings import read_settings  # noqa: E402

DATA_SEEDS = (0, 1, 2)
CLASSIFIERS = {
    "1-nearest neighbour": lambda: KNeighborsClassifier(1),
    "5-nearest neighbours": lambda: KNeighborsClassifier(5),
    "SVM, linear, C 10": lambda: SVC(kernel="linear", C=10),
    "SVM, RBF, C 10": lambda: SVC(C=10),
}


def main():
    _, settings = read_settings()
    errors = {name: [] for name in CLASSIFIERS}
    for data_seed in DATA_SEEDS:
        settings.data_seed = data_seed
        data = load_data(settings)
        scale = 1 if data.levels is None else data.levels - 1
        train_x, test_x = (x.flatten(1).numpy() / scale for x in (data.train_x[data.labelled], data.test_x))
        for name, make in CLASSIFIERS.items():
            predicted = make().fit(train_x, data.train_y[data.labelled].numpy()).predict(test_x)
            errors[name].append(100 * np.mean(predicted != data.test_y.numpy()))
    print(f"Test error, %, of classifiers trained on the {len(data.labelled)} labelled examples of "
          f"{settings.data}, data_seed {', '.join(map(str, DATA_SEEDS))}: mean")
    for name, values in errors.items():
        print(f"{name:22}", *(f"{v:6.2f}" for v in values), f":{np.mean(values):6.2f}")


if __name__ == "__main__":
    as_command(main)
