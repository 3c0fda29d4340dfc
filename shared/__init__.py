"""What the services share: the model, its state, the policies, and the messages they meet in."""
