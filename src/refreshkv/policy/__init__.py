"""The method on plain tensors: what is selected, when a layer refreshes, which drafts stand. No state."""
