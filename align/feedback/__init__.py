"""What people and models think of responses -> strengths, agreement, preference pairs."""
