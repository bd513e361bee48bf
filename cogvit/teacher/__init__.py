"""The frozen teachers of stage 1: loading them, serving them, and attaching their features to the batches."""
