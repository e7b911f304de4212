"""What a router's choices cost: waiting, cold loads, fairness, on a pool in virtual time."""
