"""The data plane envoy: our xDS feeds an Envoy that this server starts, or one beside it."""
