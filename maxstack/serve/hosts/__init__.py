"""One model over the devices of several processes: the first leads, the others do as it does (docs/serving.md)."""
