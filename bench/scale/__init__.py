"""The operator at scale: a real control plane, fake nodes, and the same work done without any operator beside it."""
