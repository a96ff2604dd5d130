"""Running calls on the kernels: ``autograd`` over ``ops`` over ``execution``; ``plans`` keeps what repeated calls have in
common."""
