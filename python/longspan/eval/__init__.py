"""Does a model still understand what it read that long ago? Passkeys, perplexity, their records."""
