"""What lies between webhooks and agents: who sent them, and where may be called back."""
