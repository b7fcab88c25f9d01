//! tmp
use vmm::config::*;
fn main() {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let a: Vec<String> = std::env::args().collect();
    if a[1] == "run" {
        let o = RunOptions { name: Some(a[2].clone()), cmdline: Some(a[3].clone()), cpus: Some(a[4].parse().unwrap()), console: Some(ConsoleConfig::Stdio), kernel: a.get(5).map(Into::into), ..Default::default() };
        let s = o.finish(HostLimits::detect(), "x").unwrap();
        println!("{:?}", vmm::run::run(s));
    } else if a[1] == "save" {
        let d = vmm::runtime_dir::RuntimeDir::open().unwrap();
        let f = d.find(&a[2]).unwrap();
        let c = vmm::api::Client::new(&f.socket).unwrap();
        println!("{:?}", c.save(&vmm::api::SaveRequest { path: a[3].clone().into(), then_stop: true }));
    } else {
        let s = RestoreSettings::new(a[2].clone().into(), None, None, false, None, None).unwrap();
        match vmm::run::restore(s) { Err(e) => println!("{e}"), x => println!("{x:?}") };
    }
}
