"""Which hour does the clock show? --rl.tasks cogvit/rl/examples/clock.py:Clock."""

import math
import random

from PIL import Image, ImageDraw


class Clock:
    """An episode is a function of its seed, and of the answers where it has several steps."""

    source = "clock"

    def reset(self, seed: int) -> list[dict[str, object]]:
        """Draw a hand and ask."""
        self.hour = random.Random(seed).randint(1, 12)
        image = Image.new("RGB", (48, 48), "white")
        draw, angle = ImageDraw.Draw(image), math.radians(30 * self.hour)
        draw.ellipse((2, 2, 45, 45), outline="black", width=2)
        draw.line((24, 24, 24 + 16 * math.sin(angle), 24 - 16 * math.cos(angle)), fill="black", width=3)
        parts = [{"type": "image", "image": image}, {"type": "text", "text": "Which hour is it?"}]
        return [{"role": "user", "content": parts}]

    def step(self, text: str) -> None:
        """Return more messages to go on, None to end."""

    def verify(self, answer: str) -> float:
        """Say what the last answer is worth, from 0 to 1."""
        return float(answer.strip(" .") == str(self.hour))
