"""What is trained: masks, the distillation loss of stage 1 and the sigmoid loss of stage 2."""
