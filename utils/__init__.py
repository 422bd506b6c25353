"""What surrounds any experiment: settings, data, metrics, figures, files, errors."""

import argparse
from types import SimpleNamespace

Settings = argparse.Namespace | SimpleNamespace      # with an attribute for each option
