"""What an attacker has and attacks."""
