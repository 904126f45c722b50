"""Calibration: selector thresholds for a given speed-up, and the speed and accuracy measured with them."""
