"""BLEU and reward scores that can be believed: metrics, paired tests, the table."""
