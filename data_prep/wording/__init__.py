"""How questions and answers are worded."""
