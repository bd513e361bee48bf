"""What every pool worker has imported before it starts: 10 s once instead of once per worker and call."""

from cogvit.parallel.cpu import prepare_process

prepare_process()
