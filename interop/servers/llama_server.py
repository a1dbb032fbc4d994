"""llama.cpp's own server from the package xllamacpp. Serves one model until it is stopped.

    llama_server.py MODEL PORT [embeddings]
"""

import signal
import sys

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.port = int(sys.argv[2])
parameters.hostnames = ["127.0.0.1"]
parameters.n_parallel = 4
parameters.n_ctx = 2048
parameters.cpuparams.n_threads = 1
if "embeddings" in sys.argv[3:]:
    parameters.embedding = True
    parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN

server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
signal.pause()
