"""Records of text, calibration samples, and prepared data: format, order, and the streams for training."""
