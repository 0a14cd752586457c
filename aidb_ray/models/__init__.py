"""Models and the tools they may call: messages in, AG-UI events out."""
