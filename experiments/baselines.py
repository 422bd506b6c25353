"""Supervised classifiers on the labelled examples alone, to compare semi-supervised runs with.

    python experiments/baselines.py --config configs/digits.yaml

Trains scikit-learn's k-nearest neighbours and support vector machines on the labelled examples that
the config's runs have with data_seed 0, 1 and 2, and prints the test error of each.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.data import load_data
from utils.errors import BadInput, run_command
from utils.settings import read_settings

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
        scale = 1 if data.grey_levels is None else data.grey_levels - 1
        train_x, test_x = (x.flatten(1).numpy() / scale
                           for x in (data.train_x[data.labelled], data.test_x))
        train_y = data.train_y[data.labelled].numpy()
        for name, build_classifier in CLASSIFIERS.items():
            if getattr(build_classifier(), "n_neighbors", 0) > len(train_y):
                raise BadInput(f"{name} needs more than {len(train_y)} labelled examples")
            predicted = build_classifier().fit(train_x, train_y).predict(test_x)
            errors[name].append(100 * np.mean(predicted != data.test_y.numpy()))
    print(f"Test error, %, of classifiers trained on the {len(data.labelled)} labelled examples of "
          f"{settings.data}, data_seed {', '.join(map(str, DATA_SEEDS))}: mean")
    for name, values in errors.items():
        print(f"{name:22}", *(f"{v:6.2f}" for v in values), f":{np.mean(values):6.2f}")


if __name__ == "__main__":
    run_command(main)
