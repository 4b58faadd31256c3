"""Which steps to compute: tables of steps, the search over lists of them, generations run again, calibration in use."""
