"""Multi-head latent attention: heads whose keys and values are read from a latent that they share."""
