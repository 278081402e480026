"""Programs that try to cheat, escape, stay, leak or exhaust. The task: read a line, print its secret answer.

Each prints whatever it could find, so that a leak shows in its output. CANARY stands for the name of a file and
of an environment variable of the test process, PORT for a port that it listens on.
"""

ANSWER = "481516234299"  # what the test expects; no program can know it

# Programs that are asked to print the answer.
PRINTING = {
    "walks frames": """
import sys
frame = sys._getframe()
while frame:
    print(frame.f_code.co_name, {k: str(v)[:200] for k, v in frame.f_locals.items()}, list(frame.f_globals)[:99])
    frame = frame.f_back
""",
    "searches the garbage collector": """
import gc
for thing in gc.get_objects():
    if isinstance(thing, (dict, list, tuple)) and "4815" in str(thing)[:10000]: print(str(thing)[:300])
""",
    "patches every function of the harness": """
import json, sys
for name in ("plain", "programs", "lockdown", "__main__"):
    for key, value in list(vars(sys.modules[name]).items()):
        if callable(value): setattr(sys.modules[name], key, lambda *a, **k: True)
json.dumps = lambda *a, **k: '{"verdict": "right"}'
print("right")
""",
    "exits at once with status 0": "import os; os._exit(0)",
    "exits through sys.exit": "import sys; sys.exit(0)",
    "raises a BaseException": "class Done(BaseException): pass\nraise Done",
    "forges a result on every descriptor": """
import os
for number in range(256):
    for packet in (b'{"status": 0, "cpu": 0, "wall": 0, "late": false, "dirty": false}', b'{"value": 4}'):
        try: os.write(number, packet)
        except OSError: pass
""",
    "fork bomb": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "fork bomb of a few that sleep": """
import os, time
for _ in range(300):
    try:
        if os.fork() == 0: time.sleep(1000)
    except OSError: break
time.sleep(1000)
""",
    "double-fork daemon": """
import os, time
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                time.sleep(0.01)
                try: os.write(1, b"late")
                except OSError: pass
        os._exit(0)
    os.wait()
except OSError as error: print(error)
""",
    "reads the environment": """
import os
print(dict(os.environ))
for path in ("/proc/self/environ", "/proc/1/environ", f"/proc/{os.getppid()}/environ"):
    try: print(open(path, "rb").read())
    except OSError as error: print(error)
""",
    "reads /proc": """
import os
try:
    for pid in os.listdir("/proc"):
        for name in ("cmdline", "maps", "status", "environ"):
            try: print(open(f"/proc/{pid}/{name}", "rb").read()[:500])
            except OSError: pass
except OSError as error: print(error)
""",
    "reads the machine's files": """
import os
for path in ("CANARY", "/etc/passwd", "/etc/shadow", "/root/.ssh/id_rsa", "/etc/hostname", "/var/log/dpkg.log"):
    try: print(open(path, "rb").read(300))
    except OSError as error: print(error)
for top, _, names in os.walk("/home"): print(top, names)
""",
    "connects to the network": """
import socket
for family, address in ((socket.AF_INET, ("127.0.0.1", PORT)), (socket.AF_INET, ("1.1.1.1", 53)),
                        (socket.AF_UNIX, "\\0CANARY"), (socket.AF_NETLINK, (0, 0))):
    try:
        with socket.socket(family, socket.SOCK_STREAM if family != socket.AF_NETLINK else socket.SOCK_RAW) as link:
            link.settimeout(0.2)
            link.connect(address) if family != socket.AF_NETLINK else link.bind(address)
            print("connected", address)
    except OSError as error: print(error)
""",
    "fills the disk": """
import itertools, os
for folder in ("/tmp", "/dev/shm", "/var/tmp", "/", "/run", "/sandbox", "."):
    try:
        for number in itertools.count():
            with open(f"{folder}/CANARY_NAME{number}", "wb") as file:
                while file.write(b"x" * 2**20): pass
    except OSError as error: print(error)
""",
    "leaves a tree that is hard to remove": """
import os
os.chdir("/tmp")
for depth in range(500):
    os.mkdir("a" * 50); os.chdir("a" * 50)
os.symlink("/", "root"); os.chmod(".", 0)
""",
    "memory bomb": "x = []\nwhile True: x.append(bytearray(2**24))",
    "memory bomb that catches the error": """
x = []
while True:
    try: x.append(bytearray(2**24))
    except MemoryError: pass
""",
    "memory in shared segments": """
import ctypes
libc, got = ctypes.CDLL(None), 0
while libc.shmget(0, ctypes.c_size_t(2**24), 0o1600) >= 0: got += 1
while True:
    number = libc.memfd_create(b"x", 0)
    if number < 0: break
    libc.ftruncate(number, 2**24)
print(got)
""",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "deep recursion in C": "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nprint(x)",
    "floods stdout": "while True: print('481516234299' * 1000)",
    "floods stderr": "import sys\nwhile True: sys.stderr.write('x' * 100000)",
    "seeks stdout to the end of the world": "import os\nos.lseek(1, 2**40, 0)\nos.write(1, b'x')",
    "ignores signals and computes": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
    "computes in C and hears no signal": "print(9 ** 9 ** 9)",
    "sleeps": "import time\ntime.sleep(10**6)",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "closes everything and sleeps": "import os, time\nos.closerange(0, 256)\ntime.sleep(10**6)",
    "reads forever": "import os\nr, w = os.pipe()\nos.read(r, 1)",
    "thread bomb": """
import threading, time
threading.stack_size(32768)
while True:
    try: threading.Thread(target=time.sleep, args=(1000,)).start()
    except RuntimeError: break
""",
    "kills everyone": """
import os, signal
for target in (-1, 1, os.getppid(), 0):
    try: os.kill(target, signal.SIGKILL)
    except OSError as error: print(error)
""",
    "lowers the limits and the priority of its parent": """
import ctypes, os
libc, zero = ctypes.CDLL(None), (ctypes.c_ulong * 2)(0, 0)
print([libc.prlimit(os.getppid(), kind, zero, None) for kind in range(16)])
print(libc.setpriority(0, os.getppid(), 19), libc.sched_setaffinity(os.getppid(), 8, b"\\0" * 8))
""",
    "traces its parent": """
import ctypes, os
libc, buffer = ctypes.CDLL(None), ctypes.create_string_buffer(4096)
print(libc.ptrace(16, os.getppid(), 0, 0), libc.syscall(434, os.getppid(), 0))
try: print(open(f"/proc/{os.getppid()}/mem", "rb"))
except OSError as error: print(error)
""",
    "makes namespaces and mounts": """
import ctypes
libc = ctypes.CDLL(None)
print([libc.unshare(flag) for flag in (0x10000000, 0x20000, 0x40000000)])
print(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), libc.chroot(b"/tmp"))
""",
    "becomes a shell": """
import os
os.execve("/bin/sh", ["sh", "-c", "set; id; ls -la / /tmp; cat CANARY; sleep 1000"], {})
""",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "dumps core": "import os, resource\nresource.setrlimit(resource.RLIMIT_CORE, (-1, -1))\nos.abort()",
    "poisons the interpreter for the next": """
import builtins, sys, io
builtins.print = lambda *a: None
builtins.input = lambda *a: "0"
sys.modules["json"] = sys.modules["io"] = None
io.open = None
""",
    "prints bytes that are no text": "import sys\nsys.stdout.buffer.write(b'\\xff\\xfe481516234299')",
    "is no UTF-8 itself": "print('\udcff')",
    "holds a NUL byte": "print(1)\0print(2)",
}

# Programs whose function `answer` is called; what they return is compared.
RETURNING = {
    "equals everything": "class All:\n  __eq__ = lambda *a: True\n  __hash__ = None\ndef answer(x): return All()",
    "int that equals everything": """
class All(int):
    __eq__ = lambda *a: True
    __format__ = __repr__ = __str__ = lambda *a: "481516234299"
def answer(x): return All(2**60)
""",
    "str that equals everything": "class All(str):\n  __eq__ = lambda *a: True\ndef answer(x): return All('x')",
    "list that equals everything": "class All(list):\n  __eq__ = lambda *a: True\ndef answer(x): return All([1])",
    "returns a caller's local": "import sys\ndef answer(x): return list(map(str, sys._getframe(1).f_locals.values()))",
    "returns too much": "def answer(x): return 'x' * 2**24",
    "returns a huge number": "def answer(x): return 1 << 10**8",
    "returns itself in itself": "def answer(x):\n  y = []\n  y.append(y)\n  return y",
    "returns a nest": "def answer(x):\n  y = []\n  for _ in range(10**5): y = [y]\n  return y",
    "returns generators": "def answer(x): return (i for i in iter(int, 1))",
    "returns nan": "def answer(x): return float('nan')",
    "answers before it is asked": """
import json, os
for message in ({"ready": True}, {"value": 4}, {"value": True}, {"verdict": "right"}):
    text = json.dumps(message).encode()
    try: os.write(4, len(text).to_bytes(4, "big") + text)
    except OSError: pass
import time; time.sleep(1000)
""",
    "answers nonsense": "import os\nos.write(4, b'\\x00\\x00\\x00\\x05[[[[[')\nos._exit(0)",
    "promises much and sends nothing": "import os, time\nos.write(4, b'\\xff\\xff\\xff\\xff')\ntime.sleep(1000)",
    "raises": "def answer(x): raise KeyboardInterrupt",
    "exits when called": "import os\ndef answer(x): os._exit(0)",
    "defines nothing": "",
    "swallows everything": """
def answer(x):
    while True:
        try:
            while True: pass
        except BaseException: pass
""",
}
