"""Records of text, calibration samples, and prepared data: format, order, the streams that training reads."""
