"""Steps that run in processes of their own, so that each one's time and memory can be measured."""
