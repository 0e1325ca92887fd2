"""Commands for a user with a trained model: each module adds its own to the command line."""
