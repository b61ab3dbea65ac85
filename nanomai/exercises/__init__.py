"""The checks of the notebooks' exercises, one file for each notebook that has some."""
