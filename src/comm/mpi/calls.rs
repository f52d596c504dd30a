//! The MPI functions used, each with its return code checked. Only this file and `window.rs` name the MPI library.
//!
//! The `mpi` crate has no persistent requests and drops return codes, so these call its C bindings
//! (`mpi::ffi`). Nothing here locks: callers hold the rank's one lock (see [`super::Core`]), as
//! `MPI_THREAD_SERIALIZED` asks, unless said otherwise. Payloads are counted in 32-bit words.

use std::ffi::{c_int, c_void};
use std::{mem, ptr};

use ::mpi::ffi;

use crate::{Error, Result};

/// A communicator whose errors come back as return codes.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Comm(ffi::MPI_Comm);
/// A request's handle. Copying it does not copy the request.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Request(ffi::MPI_Request);

// SAFETY: both are handles, valid in every thread of the process; calls are serialised by the rank's lock.
unsafe impl Send for Comm {}
// SAFETY: as above.
unsafe impl Sync for Comm {}
// SAFETY: as above.
unsafe impl Send for Request {}

/// Words of a set of processors: as many as the C library's `cpu_set_t` has room for.
pub(super) const PROCESSOR_WORDS: usize = 16;
/// A set of processors, a bit each.
pub(super) type Processors = [u64; PROCESSOR_WORDS];

/// A rank's place on its node.
#[derive(Clone, Copy, Debug)]
pub(in crate::comm) struct Place {
    /// Its number among the node's ranks.
    pub(in crate::comm) rank: usize,
    /// Ranks of the node.
    pub(in crate::comm) size: usize,
    /// Processors that one or another of them may use.
    pub(in crate::comm) cores: usize,
}

/// Turns a return code into a result.
pub(super) fn check(code: c_int, call: &str) -> Result<()> {
    if code == ffi::MPI_SUCCESS as c_int { Ok(()) } else { Err(Error::Transport(format!("{call}: {}", text(code)))) }
}

/// What MPI says about an error code.
fn text(code: c_int) -> String {
    let mut bytes = [0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut length = 0;
    // SAFETY: the buffer has the size MPI asks for.
    let found = unsafe { ffi::MPI_Error_string(code, bytes.as_mut_ptr().cast(), &mut length) };
    match found == ffi::MPI_SUCCESS as c_int {
        true => String::from_utf8_lossy(&bytes[..(length as usize).min(bytes.len())]).into_owned(),
        false => format!("MPI error {code}"),
    }
}

fn count(length: usize, what: &str) -> Result<c_int> {
    c_int::try_from(length).map_err(|_| Error::input(format!("{what}: {length} is more than MPI can count to")))
}

fn word_type() -> ffi::MPI_Datatype {
    // SAFETY: constants of the library, as are all `RSMPI_…` below.
    unsafe { ffi::RSMPI_UINT32_T }
}

/// Initialises MPI for calls from several threads, one at a time.
pub(super) fn initialise() -> Result<()> {
    let (mut already, mut provided) = (0, 0);
    // SAFETY: null arguments are allowed since MPI-2.
    unsafe {
        check(ffi::MPI_Initialized(&mut already), "MPI_Initialized")?;
        if already != 0 {
            return Err(Error::Transport("MPI is initialised already: World::join may be called only once".into()));
        }
        let wanted = ffi::RSMPI_THREAD_SERIALIZED;
        check(ffi::MPI_Init_thread(ptr::null_mut(), ptr::null_mut(), wanted, &mut provided), "MPI_Init_thread")?;
        if provided < wanted {
            return Err(Error::input(format!(
                "this MPI library provides thread level {provided}, MPI_THREAD_SERIALIZED ({wanted}) is needed: \
                 use an MPI library built with thread support"
            )));
        }
        check(ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN), "MPI_Comm_set_errhandler")
    }
}

/// Ends MPI; waits for all ranks.
pub(super) fn finalise() -> Result<()> {
    // SAFETY: called once, by the owner of the session.
    check(unsafe { ffi::MPI_Finalize() }, "MPI_Finalize")
}

/// Takes the whole job down. May be called without the lock; returns only if MPI fails to.
pub(super) fn abort(code: i32) {
    // SAFETY: allowed at any time between initialisation and finalisation.
    unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) };
}

/// What the MPI library calls itself, first line.
pub(in crate::comm) fn library() -> String {
    let mut bytes = [0u8; 8192]; // MPI_MAX_LIBRARY_VERSION_STRING is at most this in Open MPI and MPICH
    let mut length = 0;
    // SAFETY: the buffer is large enough.
    unsafe { ffi::MPI_Get_library_version(bytes.as_mut_ptr().cast(), &mut length) };
    let text = String::from_utf8_lossy(&bytes[..(length as usize).min(bytes.len())]).into_owned();
    text.lines().next().unwrap_or_default().to_string()
}

/// Whether the MPI library says that it takes addresses of GPU memory: Open MPI's extension, looked up at run time.
/// `SIDEWAYS_MPI_CUDA=1` or `0` says it for libraries that have no such function.
pub(in crate::comm) fn takes_gpu_memory() -> bool {
    if let Ok(value) = std::env::var("SIDEWAYS_MPI_CUDA") {
        return value == "1";
    }
    // SAFETY: a look-up by name; the function takes nothing and returns an int in every library that has it.
    unsafe {
        let found = libc::dlsym(libc::RTLD_DEFAULT, c"MPIX_Query_cuda_support".as_ptr());
        !found.is_null() && mem::transmute::<*mut c_void, extern "C" fn() -> c_int>(found)() == 1
    }
}

impl Comm {
    /// The library's name for it.
    pub(super) fn handle(self) -> ffi::MPI_Comm {
        self.0
    }

    /// A communicator of all ranks that shares no messages with any other. Collective.
    pub(super) fn duplicate_world() -> Result<Comm> {
        // SAFETY: handles are filled in by MPI.
        unsafe {
            let mut comm = mem::zeroed();
            check(ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, &mut comm), "MPI_Comm_dup")?;
            check(ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN), "MPI_Comm_set_errhandler")?;
            Ok(Comm(comm))
        }
    }

    /// This process's rank and how many there are.
    pub(super) fn rank_and_size(self) -> Result<(usize, usize)> {
        let (mut rank, mut size) = (0, 0);
        // SAFETY: plain queries.
        unsafe {
            check(ffi::MPI_Comm_rank(self.0, &mut rank), "MPI_Comm_rank")?;
            check(ffi::MPI_Comm_size(self.0, &mut size), "MPI_Comm_size")?;
        }
        Ok((rank as usize, size as usize))
    }

    /// The processes that share this rank's memory, and where it is among them. `mine`: the processors this rank may use, a
    /// bit each. Collective.
    pub(super) fn place_on_node(self, mine: &Processors) -> Result<(Comm, Place)> {
        let mut all: Processors = [0; PROCESSOR_WORDS];
        // SAFETY: the handle is filled in by MPI; both arrays have the length given.
        unsafe {
            let mut node = mem::zeroed();
            let (kind, info) = (ffi::RSMPI_COMM_TYPE_SHARED, ffi::RSMPI_INFO_NULL);
            check(ffi::MPI_Comm_split_type(self.0, kind, 0, info, &mut node), "MPI_Comm_split_type")?;
            let (rank, size) = Comm(node).rank_and_size()?;
            let (from, to) = (mine.as_ptr().cast(), all.as_mut_ptr().cast());
            let (number, word, or) = (mine.len() as c_int, ffi::RSMPI_UINT64_T, ffi::RSMPI_BOR);
            check(ffi::MPI_Allreduce(from, to, number, word, or, node), "MPI_Allreduce")?;
            check(ffi::MPI_Comm_set_errhandler(node, ffi::RSMPI_ERRORS_RETURN), "MPI_Comm_set_errhandler")?;
            let cores = all.iter().map(|word| word.count_ones() as usize).sum();
            Ok((Comm(node), Place { rank, size, cores }))
        }
    }

    /// The largest tag a message may have.
    pub(super) fn largest_tag(self) -> Result<u32> {
        let mut value: *mut c_int = ptr::null_mut();
        let mut found = 0;
        // SAFETY: MPI stores the address of its own integer.
        unsafe {
            let into = (&raw mut value).cast::<c_void>();
            check(ffi::MPI_Comm_get_attr(self.0, ffi::MPI_TAG_UB as c_int, into, &mut found), "MPI_Comm_get_attr")?;
            // The standard guarantees tags up to 32767.
            Ok(if found != 0 && !value.is_null() { *value as u32 } else { 32767 })
        }
    }

    /// Waits for all ranks, however long they take, without using a processor that others might need. Collective.
    pub(super) fn meet(self) -> Result<()> {
        // SAFETY: one request, tested until it is done.
        unsafe {
            let mut request = mem::zeroed();
            check(ffi::MPI_Ibarrier(self.0, &mut request), "MPI_Ibarrier")?;
            loop {
                let mut done = 0;
                check(ffi::MPI_Test(&mut request, &mut done, ffi::RSMPI_STATUS_IGNORE), "MPI_Test")?;
                if done != 0 {
                    return Ok(());
                }
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
        }
    }

    /// Every rank's bytes, in rank order; on rank 0 alone if it is `at_first`, else on all. Collective.
    pub(super) fn gather(self, bytes: &[u8], at_first: bool) -> Result<Vec<Vec<u8>>> {
        let (rank, size) = self.rank_and_size()?;
        let length = count(bytes.len(), "bytes to gather")?;
        let mut lengths = vec![0 as c_int; size];
        // SAFETY: one integer from each of `size` ranks, then the bytes at the offsets summed up from them. What is not
        // received here is not written.
        unsafe {
            let int = ffi::RSMPI_INT32_T;
            let (mine, all) = ((&raw const length).cast(), lengths.as_mut_ptr().cast());
            match at_first {
                true => check(ffi::MPI_Gather(mine, 1, int, all, 1, int, 0, self.0), "MPI_Gather")?,
                false => check(ffi::MPI_Allgather(mine, 1, int, all, 1, int, self.0), "MPI_Allgather")?,
            }
            let mut offsets = Vec::with_capacity(size);
            let mut total = 0usize;
            for &length in &lengths {
                offsets.push(count(total, "bytes gathered")?);
                total += length as usize;
            }
            // On the other ranks nothing is known of rank 0's total.
            if total == 0 && !at_first {
                return Ok(vec![Vec::new(); size]);
            }
            // Never empty: MPI takes the address that an empty one has for something else.
            let mut all = vec![0u8; total.max(1)];
            let byte = ffi::RSMPI_UINT8_T;
            // An empty slice's address is 1, which Open MPI takes for MPI_IN_PLACE.
            let sent = if bytes.is_empty() { ptr::null() } else { bytes.as_ptr().cast() };
            let received = all.as_mut_ptr().cast();
            let (lengths_, offsets_) = (lengths.as_ptr(), offsets.as_ptr());
            if at_first {
                let code = ffi::MPI_Gatherv(sent, length, byte, received, lengths_, offsets_, byte, 0, self.0);
                check(code, "MPI_Gatherv")?;
                if rank != 0 {
                    return Ok(Vec::new());
                }
            } else {
                let code = ffi::MPI_Allgatherv(sent, length, byte, received, lengths_, offsets_, byte, self.0);
                check(code, "MPI_Allgatherv")?;
            }
            Ok(offsets.iter().zip(&lengths).map(|(&at, &n)| all[at as usize..(at + n) as usize].to_vec()).collect())
        }
    }

    /// A persistent send of the `words` at `start`; a `synchronous` one completes only when its receive has begun.
    ///
    /// # Safety
    /// The memory stays where it is until the request is freed, and unwritten while it is active.
    pub(super) unsafe fn send_init(
        self,
        start: *mut u32,
        words: usize,
        to: usize,
        tag: u32,
        synchronous: bool,
    ) -> Result<Request> {
        let words = count(words, "words of a message")?;
        // SAFETY: the caller's promise.
        unsafe {
            let mut request = mem::zeroed();
            let (to, tag) = (to as c_int, tag as c_int);
            let make = if synchronous { ffi::MPI_Ssend_init } else { ffi::MPI_Send_init };
            let code = make(start.cast(), words, word_type(), to, tag, self.0, &mut request);
            check(code, "MPI_Send_init").map(|()| Request(request))
        }
    }

    /// A persistent receive of up to `words` at `start`.
    ///
    /// # Safety
    /// The memory stays where it is until the request is freed, and untouched while it is active.
    pub(super) unsafe fn receive_init(self, start: *mut u32, words: usize, from: usize, tag: u32) -> Result<Request> {
        let words = count(words, "words of a message")?;
        // SAFETY: the caller's promise.
        unsafe {
            let mut request = mem::zeroed();
            let (from, tag) = (from as c_int, tag as c_int);
            let code = ffi::MPI_Recv_init(start.cast(), words, word_type(), from, tag, self.0, &mut request);
            check(code, "MPI_Recv_init").map(|()| Request(request))
        }
    }

    /// A send of the `words` at `start`, started at once: for messages shorter than a persistent one.
    ///
    /// # Safety
    /// As [`Comm::send_init`], until it completes.
    pub(super) unsafe fn send(self, start: *mut u32, words: usize, to: usize, tag: u32) -> Result<Request> {
        let words = count(words, "words of a message")?;
        // SAFETY: the caller's promise.
        unsafe {
            let mut request = mem::zeroed();
            let (to, tag) = (to as c_int, tag as c_int);
            let code = ffi::MPI_Isend(start.cast(), words, word_type(), to, tag, self.0, &mut request);
            check(code, "MPI_Isend").map(|()| Request(request))
        }
    }

    /// A receive of up to `words` at `start`, started at once (outside of links: see [`super::raw`] and [`super::clocks`]).
    ///
    /// # Safety
    /// As [`Comm::receive_init`], until it completes.
    pub(super) unsafe fn receive(self, start: *mut u32, words: usize, from: usize, tag: u32) -> Result<Request> {
        let words = count(words, "words of a message")?;
        // SAFETY: the caller's promise.
        unsafe {
            let mut request = mem::zeroed();
            let (from, tag) = (from as c_int, tag as c_int);
            let code = ffi::MPI_Irecv(start.cast(), words, word_type(), from, tag, self.0, &mut request);
            check(code, "MPI_Irecv").map(|()| Request(request))
        }
    }

    /// Begins the sum of `words` floats over all ranks (the raw baseline of the all-reduce's benchmark). Collective.
    ///
    /// # Safety
    /// Both places have `words` floats, and are left alone until it completes.
    pub(super) unsafe fn sum(self, from: *const f32, to: *mut f32, words: usize) -> Result<Request> {
        let words = count(words, "words to sum")?;
        // SAFETY: the caller's promise.
        unsafe {
            let mut request = mem::zeroed();
            let (float, sum) = (ffi::RSMPI_FLOAT, ffi::RSMPI_SUM);
            let code = ffi::MPI_Iallreduce(from.cast(), to.cast(), words, float, sum, self.0, &mut request);
            check(code, "MPI_Iallreduce").map(|()| Request(request))
        }
    }

    /// Lets MPI work when no request of ours is active (a buffered send may still have bytes to push).
    pub(super) fn progress(self) -> Result<()> {
        let mut found = 0;
        // SAFETY: a probe receives nothing.
        let code = unsafe {
            let (any, tag) = (ffi::RSMPI_ANY_SOURCE, ffi::RSMPI_ANY_TAG);
            ffi::MPI_Iprobe(any, tag, self.0, &mut found, ffi::RSMPI_STATUS_IGNORE)
        };
        check(code, "MPI_Iprobe")
    }
}

impl Request {
    /// No request: ignored by [`Completions::test_some`].
    pub(super) fn null() -> Request {
        // SAFETY: a constant of the library.
        Request(unsafe { ffi::RSMPI_REQUEST_NULL })
    }

    /// Starts a persistent request.
    ///
    /// # Safety
    /// It is inactive, and its memory is as promised when it was made.
    pub(super) unsafe fn start(&mut self) -> Result<()> {
        // SAFETY: the caller's promise.
        check(unsafe { ffi::MPI_Start(&mut self.0) }, "MPI_Start")
    }

    /// Asks for an active receive to be given up; it completes soon, with a message or without.
    pub(super) fn cancel(&mut self) -> Result<()> {
        // SAFETY: MPI checks the handle.
        check(unsafe { ffi::MPI_Cancel(&mut self.0) }, "MPI_Cancel")
    }

    /// Frees an inactive request.
    pub(super) fn free(&mut self) -> Result<()> {
        // SAFETY: MPI checks the handle, and replaces it with the null request.
        check(unsafe { ffi::MPI_Request_free(&mut self.0) }, "MPI_Request_free")
    }

    /// Blocks until the requests complete (outside of links, as [`Comm::receive`]).
    pub(super) fn wait_all(requests: &mut [Request]) -> Result<()> {
        let number = count(requests.len(), "requests")?;
        // SAFETY: `Request` holds exactly one handle.
        let code = unsafe { ffi::MPI_Waitall(number, requests.as_mut_ptr().cast(), ffi::RSMPI_STATUSES_IGNORE) };
        check(code, "MPI_Waitall")
    }
}

/// Room for the outcomes of one test over all requests, made once.
#[derive(Default)]
pub(super) struct Completions {
    indices: Vec<c_int>,
    statuses: Vec<ffi::MPI_Status>,
}

// SAFETY: plain numbers.
unsafe impl Send for Completions {}

/// What a test over all requests found.
pub(super) enum Tested {
    /// That many requests completed: their outcomes are `outcome(0..n)`.
    Completed(usize),
    /// No request is active.
    NoneActive,
}

impl Completions {
    /// Makes room for at least `requests` outcomes.
    pub(super) fn reserve(&mut self, requests: usize) {
        let requests = requests.max(self.indices.len());
        self.indices.resize(requests, 0);
        // SAFETY: a status is plain data that MPI fills in.
        self.statuses.resize(requests, unsafe { mem::zeroed() });
    }

    /// Tests all requests and lets MPI make progress. Room must have been reserved.
    pub(super) fn test_some(&mut self, requests: &mut [Request]) -> Result<Tested> {
        let number = count(requests.len().min(self.indices.len()), "requests")?;
        let mut found = 0;
        // SAFETY: there is room for `number` outcomes; `Request` holds exactly one handle.
        let code = unsafe {
            let (indices, statuses) = (self.indices.as_mut_ptr(), self.statuses.as_mut_ptr());
            ffi::MPI_Testsome(number, requests.as_mut_ptr().cast(), &mut found, indices, statuses)
        };
        if code != ffi::MPI_ERR_IN_STATUS as c_int {
            check(code, "MPI_Testsome")?;
            // Set only on MPI_ERR_IN_STATUS, says the standard.
            self.statuses[..found.max(0) as usize].iter_mut().for_each(|status| status.MPI_ERROR = 0);
        }
        // MPI_UNDEFINED is negative in every implementation.
        Ok(if found < 0 { Tested::NoneActive } else { Tested::Completed(found as usize) })
    }

    /// The `n`-th outcome: which request, and how many words came, or what went wrong.
    pub(super) fn outcome(&self, n: usize) -> (usize, std::result::Result<usize, String>) {
        let status = &self.statuses[n];
        let mut words = 0;
        // SAFETY: MPI filled this status in.
        unsafe { ffi::MPI_Get_count(status, word_type(), &mut words) };
        let outcome = match status.MPI_ERROR == ffi::MPI_SUCCESS as c_int {
            true => Ok(words.max(0) as usize),
            false => Err(text(status.MPI_ERROR)),
        };
        (self.indices[n] as usize, outcome)
    }
}
