"""MLC's way: the model is compiled for one device, on any host, and run by TVM's virtual machine."""
