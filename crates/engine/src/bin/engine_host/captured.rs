//! A runtime that a malicious model has taken over, for tests of the sandbox. Only the test program has it.

#![allow(unsafe_code)]

use std::ffi::OsStr;
use std::io::{self, Error};
use std::net::{SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};
use std::{env, fs, thread};

use async_trait::async_trait;
use tether_engine::hardware::{Device, DeviceKind, Hardware};
use tether_engine::{
    AdapterId, EmbedRequest, Embeddings, EngineError, GenerateRequest, GenerateStream, ListedToken, LoadOptions,
    LoadSnapshot, LoadedModel, MemoryPlan, ModelId, ModelRuntime, ProgressSink, PromptInput, RerankRequest,
    RuntimeInfo, Scores, TokenListing, VerifiedArtifact,
};

/// Attempts what it is asked to count the tokens of, if that is `attempt NAME ARGUMENT`, and otherwise works as the
/// runtime in it. An attempt that succeeds counts as one token.
pub(super) struct Captured<R> {
    pub(super) runtime: R,
    /// Whether it says that it computes on a GPU, so that its sandbox leaves room for drivers.
    pub(super) has_gpu: bool,
    pub(super) panics_when_it_loads: bool,
}

#[async_trait]
impl<R: ModelRuntime> ModelRuntime for Captured<R> {
    fn describe(&self) -> RuntimeInfo {
        self.runtime.describe()
    }

    async fn hardware(&self) -> Hardware {
        let mut hardware = self.runtime.hardware().await;
        if self.has_gpu {
            let (name, description) = ("CUDA0".to_owned(), String::new());
            hardware.devices.push(Device { name, description, kind: DeviceKind::Gpu, free_bytes: 0, total_bytes: 0 });
        }
        hardware
    }

    async fn estimate(&self, artifact: &VerifiedArtifact, options: &LoadOptions) -> Result<MemoryPlan, EngineError> {
        self.runtime.estimate(artifact, options).await
    }

    async fn load(
        &self,
        artifact: VerifiedArtifact,
        options: LoadOptions,
        progress: ProgressSink,
    ) -> Result<LoadedModel, EngineError> {
        assert!(!self.panics_when_it_loads, "the load panics");
        self.runtime.load(artifact, options, progress).await
    }

    async fn add_adapter(&self, model: ModelId, artifact: VerifiedArtifact) -> Result<AdapterId, EngineError> {
        self.runtime.add_adapter(model, artifact).await
    }

    async fn remove_adapter(&self, model: ModelId, adapter: AdapterId) -> Result<(), EngineError> {
        self.runtime.remove_adapter(model, adapter).await
    }

    async fn unload(&self, model: ModelId) -> Result<(), EngineError> {
        self.runtime.unload(model).await
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream, EngineError> {
        self.runtime.generate(request).await
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings, EngineError> {
        self.runtime.embed(request).await
    }

    async fn rerank(&self, request: RerankRequest) -> Result<Scores, EngineError> {
        self.runtime.rerank(request).await
    }

    async fn list_tokens(
        &self,
        model: ModelId,
        input: &PromptInput,
        listing: TokenListing,
    ) -> Result<Vec<ListedToken>, EngineError> {
        self.runtime.list_tokens(model, input, listing).await
    }

    async fn count_tokens(&self, model: ModelId, input: &PromptInput) -> Result<u32, EngineError> {
        let attempted = match input {
            PromptInput::Text(text) => text.strip_prefix("attempt ").and_then(|words| words.split_once(' ')),
            _ => None,
        };
        let Some((name, argument)) = attempted else { return self.runtime.count_tokens(model, input).await };
        let (name, argument) = (name.to_owned(), argument.to_owned());
        // What a traced process is attached to ends with its thread.
        let attempt = thread::spawn(move || attempt(&name, &argument)).join();
        match attempt.unwrap_or_else(|_| Err(Error::other("it panicked"))) {
            Ok(()) => Ok(1),
            Err(error) => Err(EngineError::Failed { reason: error.to_string() }),
        }
    }

    fn load_state(&self) -> Vec<LoadSnapshot> {
        self.runtime.load_state()
    }
}

/// Attempts `NAME ARGUMENT`. The process fails if the attempt does, and says why.
pub(super) fn attempted(words: &[String]) -> ExitCode {
    let Some((name, arguments)) = words.split_first() else { return ExitCode::from(2) };
    match attempt(name, &arguments.join(" ")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn attempt(name: &str, argument: &str) -> io::Result<()> {
    match name {
        "environment" if env::var_os(argument).is_some() => Ok(()),
        "environment" => Err(Error::other("it is not set")),
        "read" => fs::read(argument).map(drop),
        "look" => fs::metadata(argument).map(drop),
        "list" => fs::read_dir(argument).map(drop),
        "write" => fs::write(argument, "written"),
        "mode" => fs::set_permissions(argument, fs::metadata(argument)?.permissions()),
        "inherited" => inherited(argument),
        "tcp" => TcpStream::connect(argument).map(drop),
        "udp" => UdpSocket::bind("127.0.0.1:0")?.send_to(b"hello", argument).map(drop),
        "unix" => UnixStream::connect(OsStr::from_bytes(argument.as_bytes())).map(drop),
        "listen" => TcpListener::bind(argument).map(drop),
        "unbound" => listen_unbound(),
        "socket" => socket(argument),
        "pair" => UnixDatagram::pair().map(drop),
        "open" => connect_with_first_bytes(argument),
        "namespace" => namespace(),
        "execute" => Err(Command::new(argument).exec()),
        "spawn" => Command::new(argument).status().map(drop),
        "fork" => fork(),
        "trace" => trace(pid(argument)?),
        // SAFETY: a process that runs ignores the signal.
        "signal" => check(unsafe { libc::kill(pid(argument)?, libc::SIGCONT) }),
        // SAFETY: the call makes a descriptor and reads no memory.
        "handle" => check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid(argument)?, 0) } as i32),
        "ring" => ring(),
        "call" => call(argument),
        _ => Err(Error::other("there is no such attempt")),
    }
}

/// Succeeds if a file is open in this process.
fn inherited(path: &str) -> io::Result<()> {
    let mut open = fs::read_dir("/proc/self/fd")?.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    open.any(|file| file.as_os_str() == path).then_some(()).ok_or_else(|| Error::other("it is not open"))
}

fn pid(argument: &str) -> io::Result<libc::pid_t> {
    argument.parse().map_err(Error::other)
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

fn fork() -> io::Result<()> {
    // SAFETY: the child does nothing but end.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::_exit(0);
        }
        check(child)?;
        check(libc::waitpid(child, std::ptr::null_mut(), 0))
    }
}

/// Makes a socket of a family, type and protocol.
fn socket(numbers: &str) -> io::Result<()> {
    let numbers: Vec<i32> =
        numbers.split(' ').map(|number| number.parse().map_err(Error::other)).collect::<Result<_, _>>()?;
    let [family, kind, protocol] = numbers[..] else { return Err(Error::other("three numbers make a socket")) };
    // SAFETY: the call takes numbers only.
    check(unsafe { libc::socket(family, kind, protocol) })
}

/// Listens without `bind`, on a port that the kernel picks.
fn listen_unbound() -> io::Result<()> {
    // SAFETY: the calls take numbers only.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        check(socket)?;
        check(libc::listen(socket, 1))
    }
}

/// Connects with the first message and without `connect` (TCP Fast Open).
fn connect_with_first_bytes(address: &str) -> io::Result<()> {
    let address: SocketAddrV4 = address.parse().map_err(Error::other)?;
    let mut name = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
        sin_zero: [0; 8],
    };
    let mut text = *b"secret";
    let mut part = libc::iovec { iov_base: text.as_mut_ptr().cast(), iov_len: text.len() };
    // SAFETY: a message of zeros has no parts, and the ones that are set outlive the call.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_name = (&raw mut name).cast();
        message.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        let socket = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        check(socket)?;
        check(libc::sendmsg(socket, &raw const message, libc::MSG_FASTOPEN) as i32)
    }
}

/// Starts a process with users of its own, in which it is root.
fn namespace() -> io::Result<()> {
    // SAFETY: without a stack of its own the child runs on, and does nothing but end.
    unsafe {
        let child = libc::syscall(libc::SYS_clone, libc::CLONE_NEWUSER | libc::SIGCHLD, 0, 0, 0, 0) as i32;
        if child == 0 {
            libc::_exit(0);
        }
        check(child)?;
        check(libc::waitpid(child, std::ptr::null_mut(), 0))
    }
}

fn trace(process: libc::pid_t) -> io::Result<()> {
    let nothing = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: seizing stops nothing and writes no memory.
    check(unsafe { libc::ptrace(libc::PTRACE_SEIZE, process, nothing, nothing) } as i32)
}

/// Makes the system call of a number, with these first arguments and senseless others. Succeeds if a filter lets it
/// through, whatever the kernel then says.
fn call(numbers: &str) -> io::Result<()> {
    let mut numbers = numbers.split(' ').map(|number| number.parse::<libc::c_long>().map_err(Error::other));
    let mut next = || numbers.next().unwrap_or(Ok(-1));
    let (number, arguments) = (next()?, [next()?, next()?, next()?]);
    let [first, second, third] = arguments;
    // SAFETY: the other arguments are -1, which is no address.
    let result = unsafe { libc::syscall(number, first, second, third, -1_i64, -1_i64, -1_i64) };
    let error = Error::last_os_error();
    if result < 0 && error.raw_os_error() == Some(libc::EPERM) { Err(error) } else { Ok(()) }
}

/// Makes an asynchronous queue, through which other calls can be made past a filter.
fn ring() -> io::Result<()> {
    let mut parameters = [0_u8; 120];
    // SAFETY: the parameters have the size that the kernel writes.
    check(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) } as i32)
}
