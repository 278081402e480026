"""What a process can no longer do: seccomp, Landlock and resource limits, by ctypes; inside the sandbox.

Nothing here needs privileges. Each layer is installed by a process on itself and inherited by all it starts.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import stat
import struct
import sys

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_SECCOMP_MODE_FILTER, _SECCOMP_GET_ACTION_AVAIL = 2, 2
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000  # SECCOMP_RET_*
_EPERM, _ENOSYS = 1, 38
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF: ld [k], jeq, jge, jset, ret
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets into struct seccomp_data; low half of the argument
_NEW_NAMESPACES = 0x7E020000 | 0x80  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET,TIME}
_CLONE_THREAD = 0x00010000
_X32_BIT = 0x40000000

# name: (x86-64, arm64); -1 where there is none. First those that no program needs, whatever their arguments.
_DENIED = {
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "tkill": (200, 130),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    # the network, and memory that no limit counts
    "socket": (41, 198), "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188),
    "msgctl": (71, 187), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "mq_open": (240, 180), "mq_unlink": (241, 181),
    # namespaces and mounts
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "move_mount": (429, 429), "open_tree": (428, 428), "mount_setattr": (442, 442),
    # large parts of the kernel
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262), "modify_ldt": (154, -1), "personality": (135, 92),
    # the machine
    "quotactl": (179, 60), "acct": (163, 89), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "syslog": (103, 116), "iopl": (172, -1), "ioperm": (173, -1),
}  # fmt: skip
# Allowed on the process itself only: with the same user, a program could stop or starve the one that watches it.
_SELF_ONLY = {
    "kill": (62, 129), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "prlimit64": (302, 261),
}  # fmt: skip
_FORK, _VFORK, _CLONE, _CLONE3 = (57, -1), (58, -1), (56, 220), (435, 435)
_SECCOMP = (317, 277)
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # on both
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # (column, AUDIT_ARCH_*)

_READ_FOLDER, _READ_FILE, _USE_DEVICE = 0b1101, 0b101, 0b110  # of EXECUTE, WRITE_FILE, READ_FILE, READ_DIR
_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}  # all file rights of each ABI; later ones add none


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


def has_seccomp() -> bool:
    """The kernel takes filters, and we know its system call numbers."""
    if platform.machine() not in _ARCHITECTURES or sys.byteorder != "little":
        return False
    column = _ARCHITECTURES[platform.machine()][0]
    action = ctypes.c_uint32(_ERRNO)
    return _libc.syscall(_SECCOMP[column], _SECCOMP_GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0


def landlock_abi() -> int:
    """Version of Landlock; 0 if the kernel has none."""
    return max(0, _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def give_up_privileges() -> None:
    """No exec gains privileges from here on, and no process of the same user can look into this one."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "PR_SET_DUMPABLE")


def restrict_files(readable: list[str], writable: list[str]) -> None:
    """Landlock: only these folders and files, no TCP, and no signals to processes outside, as far as the ABI goes."""
    abi = landlock_abi()
    rights = _RIGHTS[min(abi, 5)]
    attributes = struct.pack("QQQ", rights, 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _check(_libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0), "landlock_create_ruleset")
    for path in [*readable, *writable]:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        kind = os.fstat(opened).st_mode
        wanted = _READ_FOLDER if stat.S_ISDIR(kind) else _USE_DEVICE if stat.S_ISCHR(kind) else _READ_FILE
        rule = struct.pack("=Qi", rights if path in writable else wanted, opened)
        _check(_libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
        os.close(opened)
    _check(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def restrict_calls(*, may_fork: bool) -> None:
    """seccomp: none of the calls above, no namespaces, signals and limits only for the caller; forks if it may."""
    code = _filter(own_pid=os.getpid(), may_fork=may_fork)
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(_Program(len(code) // 8, code)), 0, 0),
           "PR_SET_SECCOMP")  # fmt: skip


def limit(*, cpu_seconds: int, memory_bytes: int, file_bytes: int, processes: int | None) -> None:
    """Resource limits of this process and what it starts; `processes` counts those of the user, threads included."""
    wanted = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_STACK: memory_bytes // 4,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if processes is not None:
        wanted[resource.RLIMIT_NPROC] = processes
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # CPU: SIGXCPU can be ignored, SIGKILL a second later cannot.
        resource.setrlimit(kind, (value, value + 1 if kind == resource.RLIMIT_CPU else value))


def _filter(*, own_pid: int, may_fork: bool) -> bytes:
    column, architecture = _ARCHITECTURES[platform.machine()]
    error = _ERRNO | _EPERM
    code = [
        (_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32_BIT), (_RETURN, 0, 0, error),
    ]  # fmt: skip
    always = [numbers[column] for numbers in _DENIED.values()]
    if not may_fork:
        always += [_FORK[column], _VFORK[column]]
    for number in always:
        if number >= 0:
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, error)]
    # glibc falls back from clone3, whose flags a filter cannot see, to clone.
    code += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    code += [(_EQUAL, 0, 6, _CLONE[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_ANY_BIT, 0, 1, _NEW_NAMESPACES),
             (_RETURN, 0, 0, error), (_ANY_BIT, 1, 0, 0 if may_fork else _CLONE_THREAD),
             (_RETURN, 0, 0, _ALLOW if may_fork else error), (_RETURN, 0, 0, _ALLOW)]  # fmt: skip
    for numbers in _SELF_ONLY.values():
        code += [(_EQUAL, 0, 5, numbers[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_EQUAL, 2, 0, own_pid),
                 (_EQUAL, 1, 0, 0 if numbers is _SELF_ONLY["prlimit64"] else own_pid), (_RETURN, 0, 0, error),
                 (_RETURN, 0, 0, _ALLOW)]  # fmt: skip
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
