//! The limit: as many bytes over TCP between two processes, from populated guest memory into fresh
//! guest memory, with nothing but reads and writes of 1 MiB.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use ::tests::bench::Result;
use migration::volatile_io;
use vmm::memory::{GuestRam, PAGE_SIZE};

const BLOCK: u64 = 1 << 20;
/// First arguments that make this program one of the two processes.
const SEND: &str = "raw-send";
const RECEIVE: &str = "raw-receive";

/// A process that copies.
#[derive(Debug)]
struct Copier {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Copier {
    fn start(arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut process =
            command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = process.stdin.take().ok_or("no standard input")?;
        let output = BufReader::new(process.stdout.take().ok_or("no standard output")?);
        Ok(Self { process, input, output })
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        match self.output.read_line(&mut line)? {
            0 => Err("a copying process ended early".into()),
            _ => Ok(line.trim_end().to_owned()),
        }
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Both processes, connected.
#[derive(Debug)]
pub struct RawCopy {
    sender: Copier,
    receiver: Copier,
}

impl RawCopy {
    /// Fills the sender's memory and connects the two.
    pub fn prepare(bytes: u64) -> Result<Self> {
        let bytes = bytes.to_string();
        let mut receiver = Copier::start(&[RECEIVE, &bytes])?;
        let address = receiver.line()?;
        let mut sender = Copier::start(&[SEND, &bytes, &address])?;
        sender.line()?;
        Ok(Self { sender, receiver })
    }

    /// Sender and receiver.
    pub fn pids(&self) -> Vec<u32> {
        vec![self.sender.process.id(), self.receiver.process.id()]
    }

    /// Copies; until the receiver acknowledged the last byte, by the sender's clock.
    pub fn run(&mut self) -> Result<Duration> {
        writeln!(self.sender.input, "go")?;
        Ok(Duration::from_nanos(self.sender.line()?.parse()?))
    }
}

/// Is one of the two processes, if the command line says so.
pub fn copier(arguments: &[String]) -> Option<Result<()>> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        [SEND, bytes, address] => Some(bytes.parse().map_err(Into::into).and_then(|bytes| {
            let stdin = BufReader::new(std::io::stdin());
            send(bytes, address, stdin, std::io::stdout())
        })),
        [RECEIVE, bytes] => {
            Some(bytes.parse().map_err(Into::into).and_then(|b| receive(b, std::io::stdout())))
        }
        _ => None,
    }
}

/// Calls `each` with the address and length of every block.
fn blocks(ram: &GuestRam, mut each: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
    for region in ram.regions() {
        let mut done = 0;
        while done < region.len {
            let step = (region.len - done).min(BLOCK);
            each(region.gpa + done, step)?;
            done += step;
        }
    }
    Ok(())
}

fn send(bytes: u64, address: &str, mut go: impl BufRead, mut say: impl Write) -> Result<()> {
    let ram = GuestRam::new(bytes.next_multiple_of(PAGE_SIZE), false)?;
    let contents: Vec<u8> = (1..=251).cycle().take(usize::try_from(BLOCK)?).collect();
    blocks(&ram, |gpa, length| {
        ram.slice(gpa, length)?.copy_from(&contents);
        Ok(())
    })?;
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    writeln!(say, "ready")?;
    say.flush()?;
    go.read_line(&mut String::new())?;
    let begin = Instant::now();
    blocks(&ram, |gpa, length| {
        Ok(volatile_io::write_all(stream.as_fd(), &[], &[ram.slice(gpa, length)?])?)
    })?;
    stream.read_exact(&mut [0])?;
    writeln!(say, "{}", begin.elapsed().as_nanos())?;
    Ok(())
}

fn receive(bytes: u64, mut say: impl Write) -> Result<()> {
    let ram = GuestRam::new(bytes.next_multiple_of(PAGE_SIZE), false)?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    writeln!(say, "{}", listener.local_addr()?)?;
    say.flush()?;
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    blocks(&ram, |gpa, length| {
        Ok(volatile_io::read_exact(stream.as_fd(), &[ram.slice(gpa, length)?])?)
    })?;
    stream.write_all(&[1])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn all_bytes_are_sent() {
        let bytes = 3 * BLOCK + PAGE_SIZE;
        let (reader, writer) = std::io::pipe().unwrap();
        let receiver = std::thread::spawn(move || receive(bytes, writer).unwrap());
        let mut address = String::new();
        BufReader::new(reader).read_line(&mut address).unwrap();
        let mut said = Vec::new();
        send(bytes, address.trim_end(), &b"go\n"[..], &mut said).unwrap();
        receiver.join().unwrap();
        let said = String::from_utf8(said).unwrap();
        let took = said.strip_prefix("ready\n").unwrap().trim_end();
        assert!(took.parse::<u64>().unwrap() > 0);
    }
}
