/** A machine that does nothing but to be asked. */
class Idle {
    public static void main(String[] args) throws Exception {
        Thread.currentThread().join();
    }
}
