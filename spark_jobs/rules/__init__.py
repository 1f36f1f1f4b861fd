"""Rules as data: what makes traffic invalid, how orders are credited. Every result names the hash of the rule set it came from."""
