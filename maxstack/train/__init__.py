"""Training: objectives, the step, the loop and what it leaves behind."""
