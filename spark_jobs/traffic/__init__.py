"""Invalid traffic: its rules, and the review that judges whole hours by them."""
