"""What tests share: references, checkpoints, engines, servers, and plugins of pytest."""
