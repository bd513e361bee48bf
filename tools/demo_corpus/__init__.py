"""What the demo corpus is made of: pictures that come with packages pip installs, each with two captions."""
