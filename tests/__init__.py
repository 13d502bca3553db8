"""Tests; a folder per part of the package. Helper modules are imported as `tests.FOLDER.MODULE`."""
