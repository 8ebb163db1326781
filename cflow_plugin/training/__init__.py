"""How the model is trained (section 5.1): features kept in memory, calibration when training ends, going on later."""
