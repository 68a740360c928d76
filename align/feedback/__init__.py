"""Turn judgements of responses into strengths, agreement and preference pairs."""
