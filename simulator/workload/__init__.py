"""What arrives: when, with which lengths and prompts, and when rejected clients come back."""
