"""Files or hub data sets -> records -> token groups -> token batches."""
