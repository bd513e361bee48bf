"""What an encoder is worth: features of held-out samples and the figures that are made of them."""
