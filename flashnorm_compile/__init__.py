"""Differentially private training as a torch.compile backend."""
