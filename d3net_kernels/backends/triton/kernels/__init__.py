"""What runs on the GPU.

prepare.py evaluates psi once for every element, before a forward pass: it writes the sources of a
call into one workspace, pixel by pixel, so that whatever their layout and normalisation a tap is a
plain copy of 16 bytes a thread into shared memory. (A tap that evaluates psi itself costs three to
four times the instructions: Triton cannot shift a tile that lies in shared memory.)

The other three are implicit matrix products over pixels. In the forward pass and the data gradient
a program owns a tile of pixels of one image, which runs along the rows, flattened, so that any map
fills it. Per source it walks over chunks of channels and, within one, over those taps that reach
into the map from at least one pixel of the tile. In the weight gradient a program owns a block of
channels at the taps of one column and walks over a slab of rows; there it is the gradient of the
output that moves (prepared too), so that the sources are read where they lie, psi on load, once for
all taps of the program.

Outputs are covered by one block of a power of two, BLOCK, and optionally a smaller one behind it,
REST: 36 outputs are 32 + 8 and not 64.

Numbers that belong to a source come as one tuple per source. They are packed so that Triton does
not compile anew for each of their values (see views.py), and chosen at run time, so that the code
does not grow with the number of sources.
"""
