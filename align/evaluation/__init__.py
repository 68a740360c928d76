"""Evaluation: BLEU and other metrics, paired tests, rewards under test, the table."""
