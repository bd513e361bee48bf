"""A check of ten minutes on one GPU: sections of plain functions, each of which returns its figures."""
