"""Texts, and the tokens that calibration runs on."""
