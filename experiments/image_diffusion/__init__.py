"""Does cosine-sim attention make a diffusion transformer's images worse where its loss does not show it?"""
