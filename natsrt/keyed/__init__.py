"""Keyed agents as their owner sees them: one live instance per id over all workers, with stored state."""
